"""Models from the hub: huggingface_hub's own client against a hub on the loopback, and all that can go wrong there.

Set apart from the network: the server is this machine's, and tests that start programs give them their own environment.
"""

import errno
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hub_server import HALF_UNET, PLAIN_UNET, WANTED, HubServer, content, git, pipeline, sha256

from ldm.errors import STOPPED, LDMError
from ldm.hub import client, download, zoo
from ldm.hub import fetching as hub
from ldm.io.folders import MOST_JSON_BYTES

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A hub, and this process's huggingface_hub pointed at it with an empty cache."""
    import huggingface_hub
    from huggingface_hub import constants

    with HubServer() as server:
        for name, value in {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "hub"),
            "HF_TOKEN_PATH": str(tmp_path / "token"),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DOWNLOAD_TIMEOUT": 2,
            "HF_HUB_ETAG_TIMEOUT": 2,
        }.items():
            monkeypatch.setattr(constants, name, value)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
        monkeypatch.setattr(download, "WAIT", 0.0)
        yield server
        huggingface_hub.close_session()


@pytest.fixture
def said():
    """The lines that were said, and what says them."""
    lines = []
    return lines, lines.append


def fetch(name, *args, **options) -> Path:
    return hub.fetch(name, *args, **{"say": lambda line: None} | options)


def held(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def fetched(server) -> list[str]:
    """The names of the files of org/name whose bytes were asked for, once each."""
    paths = [path for path in server.asked("/") if path.startswith(("/org/name/resolve/", "/cdn/org/name/"))]
    return sorted({re.sub(r"^.*?/[0-9a-f]{40}/", "", path) for path in paths})


def use_zoo(monkeypatch, text: str) -> None:
    table = zoo.read_zoo(text, "zoo.toml")
    for module in (zoo, hub):
        monkeypatch.setattr(module, "zoo", lambda: table)


# ---------------------------------------------------------------------------------------------------- fetching


def test_only_what_is_read_is_fetched(server, said):
    lines, say = said
    files = pipeline()
    commit = server.add("org/name", files)
    assert hub.local("org/name") is None and not server.asked("org/")
    place = hub.fetch("org/name", say=say)
    assert place.name == commit and held(place) == WANTED == fetched(server)
    assert all((place / name).read_bytes() == files[name] for name in WANTED)
    assert len(lines) == 1 and re.fullmatch(
        r"org/name at \w{12}: 900\.\d kB in 9 files to fetch; licence: openrail\+\+\.", lines[0]
    )


def test_the_variant_is_fetched_and_the_rest_shared(server):
    server.add("org/name", pipeline())
    place = fetch("org/name", "fp16")
    assert HALF_UNET in held(place) and PLAIN_UNET not in held(place)
    asked = len(server.requests)
    assert hub.local("org/name", "fp16") == place and hub.local("org/name") is None  # the hub has the other, too
    assert len(server.requests) == asked
    assert fetch("org/name") == place and PLAIN_UNET in held(place)
    assert len([path for path in server.asked("vae/config.json")]) == 1


def test_nothing_is_asked_for_what_is_here(server, monkeypatch):
    server.add("org/name", pipeline(without=("vae/diffusion_pytorch_model.fp16.safetensors",)))
    place = fetch("org/name", "fp16")  # the VAE has no such variant, which the listing tells
    asked = len(server.requests)

    def forbidden(*args, **options):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket, "socket", forbidden)
    monkeypatch.setattr(socket, "create_connection", forbidden)
    for offline in (False, True):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
        assert hub.local("org/name", "fp16") == fetch("org/name", "fp16") == place
    assert len(server.requests) == asked


def test_a_cache_that_another_program_filled(server):
    """Without a listing of the repository what is here must suffice, or the hub is asked."""
    from huggingface_hub import hf_hub_download

    server.add("org/name", pipeline())
    for name in WANTED:
        hf_hub_download("org/name", name)
    asked = len(server.requests)
    assert held(hub.local("org/name")) == WANTED and hub.local("org/name", "fp16") is None
    assert len(server.requests) == asked
    assert hub.local("org/name", "fp16", settle=True) == hub.local("org/name")


@pytest.mark.parametrize("lost", WANTED)
def test_each_file_is_missed(server, lost):
    server.add("org/name", pipeline())
    place = fetch("org/name")
    (place / lost).unlink()
    assert hub.local("org/name") is None
    assert held(fetch("org/name")) == WANTED


@pytest.mark.parametrize("name", ["unet/config.json", PLAIN_UNET])
def test_a_file_cut_short_in_the_cache_is_fetched_again(server, name):
    files = pipeline()
    server.add("org/name", files)
    place = fetch("org/name")
    os.truncate((place / name).resolve(), 5)
    assert hub.local("org/name") is None
    assert fetch("org/name") == place and (place / name).read_bytes() == files[name]


def test_a_small_file_that_was_changed_is_fetched_again(server):
    files = pipeline()
    server.add("org/name", files)
    place = fetch("org/name")
    (place / "model_index.json").resolve().write_bytes(b"{" * len(files["model_index.json"]))
    assert fetch("org/name") == place and (place / "model_index.json").read_bytes() == files["model_index.json"]


def test_a_single_file(server):
    server.add("org/name", pipeline())
    place = fetch("org/name/v1-5.safetensors")
    assert place.read_bytes() == content("v1-5.safetensors") and fetched(server) == ["v1-5.safetensors"]
    assert hub.local("org/name/v1-5.safetensors") == place
    with pytest.raises(LDMError, match=r"v1-5.ckpt is a pickle.*--allow-pickle"):
        fetch("org/name/v1-5.ckpt")
    assert fetch("org/name/v1-5.ckpt", allow_pickle=True).read_bytes() == content("v1-5.ckpt")
    with pytest.raises(LDMError, match=r"no file other.safetensors: it has v1-5.ckpt, v1-5.safetensors, "):
        fetch("org/name/other.safetensors")


def test_a_repository_of_pickles(server):
    server.add("org/name", {"config.json": b"{}", "diffusion_pytorch_model.bin": b"pickled"})
    with pytest.raises(LDMError, match="only as pickles"):
        fetch("org/name")
    assert fetched(server) == []
    place = fetch("org/name", allow_pickle=True)
    assert held(place) == ["config.json", "diffusion_pytorch_model.bin"]
    assert hub.local("org/name") is None and hub.local("org/name", allow_pickle=True) == place


# ---------------------------------------------------------------------------------------------------- revisions


def test_a_branch_that_moves(server):
    first = server.add("org/name", pipeline())
    place = fetch("org/name")
    second = server.add("org/name", pipeline() | {PLAIN_UNET: b"newer"})
    assert fetch("org/name") == place and place.name == first  # what is here stays
    newer = fetch("org/name", update=True)
    assert newer.name == second and (newer / PLAIN_UNET).read_bytes() == b"newer"
    assert hub.local("org/name") == newer and hub.local(f"org/name@{first}") == place
    assert (place / PLAIN_UNET).read_bytes() == content(PLAIN_UNET)


def test_all_files_come_from_one_commit(server):
    """The branch moves while the first files are under way."""
    first, files = server.add("org/name", pipeline()), pipeline()
    todo = hub.plan("org/name")
    server.add("org/name", {name: b"{}" for name in files})
    place = hub.carry_out(todo, say=lambda line: None)
    assert place.name == first and all((place / name).read_bytes() == files[name] for name in WANTED)


def test_a_branch_stands_until_the_next_commit_is_whole(server):
    server.add("org/name", pipeline())
    place = fetch("org/name")
    server.add("org/name", pipeline() | {PLAIN_UNET: b"newer" * 1000})
    server.wrong[PLAIN_UNET] = b"wrong" * 1000
    with pytest.raises(LDMError, match="hash differs"):
        fetch("org/name", update=True)
    assert hub.local("org/name") == place


def test_a_revision_that_is_asked_for(server):
    first = server.add("org/name", pipeline())
    server.add("org/name", pipeline() | {PLAIN_UNET: b"newer"})
    assert fetch(f"org/name@{first}").name == first and hub.local("org/name") is None
    with pytest.raises(LDMError, match="org/name has no such revision"):
        fetch("org/name@v9")


# ---------------------------------------------------------------------------------------------------- faults under way


def test_a_cut_connection_is_taken_up(server):
    server.add("org/name", pipeline())
    server.cut[PLAIN_UNET] = [100_000, 0, 50_000]
    place = fetch("org/name")
    assert (place / PLAIN_UNET).read_bytes() == content(PLAIN_UNET)
    ranges = [r.headers["Range"] for r in server.requests if r.path.startswith("/cdn/") and PLAIN_UNET in r.path]
    assert ranges == [f"bytes={start}-" for start in (0, 100_000, 100_000, 150_000)]


def test_a_connection_that_is_cut_for_good_and_the_next_run(server):
    server.add("org/name", pipeline())
    server.cut[PLAIN_UNET] = [100_000] + [0] * 9
    with pytest.raises(LDMError, match=r"did not give org/name/unet/.*run it again, it goes on"):
        fetch("org/name")
    assert hub.local("org/name") is None
    server.cut.clear()
    before = len(server.requests)
    place = fetch("org/name")
    later = [r for r in server.requests[before:] if r.method == "GET"]
    assert (place / PLAIN_UNET).read_bytes() == content(PLAIN_UNET)
    assert [r.headers["Range"] for r in later if r.path.startswith("/cdn/") and PLAIN_UNET in r.path] == [
        "bytes=100000-"
    ]
    assert not any("unet/config.json" in r.path or "text_encoder" in r.path for r in later)  # finished files stay
    assert not list(place.parents[1].rglob("*part"))


def test_a_server_without_ranges_begins_anew(server):
    server.add("org/name", pipeline())
    server.ranges = False
    server.cut[PLAIN_UNET] = [100_000]
    assert (fetch("org/name") / PLAIN_UNET).read_bytes() == content(PLAIN_UNET)
    server.add("org/name", pipeline() | {PLAIN_UNET: b"n" * 200_000})
    server.cut[PLAIN_UNET] = [
        100_000,
        90_000,
        99_000,
        98_000,
        1,
        50,
        7,
        100_000,
        3,
        3,
    ]  # never further: no endless loop
    with pytest.raises(LDMError, match="run it again"):
        fetch("org/name", update=True)


@pytest.mark.parametrize(
    "name, data, what",
    [
        (PLAIN_UNET, b"w" * 300_001, "hash differs"),
        (PLAIN_UNET, b"w" * 400_000, "longer than the hub lists"),
        (PLAIN_UNET, b"w" * 200_000, "shorter than the hub lists"),
        (PLAIN_UNET, b"", "shorter than the hub lists"),
        ("unet/config.json", b'{"of": "unet/c0nfig.json"}', "hash differs"),
    ],
)
def test_wrong_content_never_stays(server, name, data, what):
    server.add("org/name", pipeline())
    server.wrong[name] = data
    with pytest.raises(LDMError, match=what):
        fetch("org/name")
    assert hub.local("org/name") is None
    blobs = download.storage("org/name") / "blobs"
    for blob in blobs.iterdir():  # what has a hash for its name has it rightly
        known = blob.read_bytes()
        assert blob.name.endswith(".ldm-part") or blob.name in (sha256(known), git(known))
    server.wrong.clear()
    place = fetch("org/name")
    assert (place / name).read_bytes() == content(name)


def test_a_part_that_was_spoilt_is_thrown_away(server):
    server.add("org/name", pipeline())
    blobs = download.storage("org/name") / "blobs"
    blobs.mkdir(parents=True)
    part = blobs / (sha256(content(PLAIN_UNET)) + ".ldm-part")
    part.write_bytes(b"x" * 1000)
    with pytest.raises(LDMError, match="hash differs"):
        fetch("org/name")
    assert not part.exists()
    part.write_bytes(b"x" * 300_002)  # longer than the file
    assert (fetch("org/name") / PLAIN_UNET).read_bytes() == content(PLAIN_UNET)


def test_a_slow_server_is_not_waited_for_for_ever(server, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    monkeypatch.setattr(download, "TRIES", 1)
    server.add("org/name", pipeline())
    server.hang[PLAIN_UNET] = 0.5
    with pytest.raises(LDMError, match=r"did not give org/name/unet/.*\(ReadTimeout\): run it again"):
        fetch("org/name")


@pytest.mark.parametrize(
    "part, status, what",
    [
        ("/api/models", 500, r"could not give org/name \(status 500\): run it again"),
        ("/api/models", 429, "too many requests"),
        ("/cdn/", 503, r"could not give org/name/text_encoder/model.safetensors \(status 503\)"),
        ("/cdn/", 403, r"refuses org/name/text_encoder/model.safetensors \(403\)"),
        ("model_index.json", 403, r"refuses org/name/model_index.json \(403\)"),
        ("/cdn/", 404, r"could not give .* \(status 404\)"),
    ],
)
def test_answers_that_are_errors(server, monkeypatch, part, status, what):
    monkeypatch.setattr(download, "TRIES", 1)
    server.add("org/name", pipeline())
    server.status[part] = status
    with pytest.raises(LDMError, match=what) as caught:
        fetch("org/name")
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_nobody_answers(server, monkeypatch):
    server.add("org/name", pipeline())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", dead)
    with pytest.raises(LDMError, match=rf"{dead} did not give org/name \(ConnectError\).*HF_ENDPOINT"):
        fetch("org/name")


def test_what_answers_is_no_hub(server):
    server.status["/api/models"] = 200
    with pytest.raises(LDMError, match="not as a hub does: check HF_ENDPOINT"):
        fetch("org/name")


def test_a_listing_without_a_commit(server):
    server.add("org/name", pipeline())
    repo = server.repos["org/name"]
    repo.commits = {"v1": repo.commits[repo.main]}
    repo.main = "v1"
    with pytest.raises(LDMError, match="not as a hub does: check HF_ENDPOINT"):
        fetch("org/name")


def test_a_full_disk(server, monkeypatch):
    server.add("org/name", pipeline())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 5000, 5000))
    with pytest.raises(LDMError, match=r"org/name needs 900\.\d kB and .* has 5\.0 kB free: make room.*HF_HOME"):
        fetch("org/name")
    assert not server.asked("safetensors")
    monkeypatch.undo()


def test_a_disk_that_fills_up_under_way(server, monkeypatch):
    server.add("org/name", pipeline())
    stream = download._stream

    def filling(url, out, size, bar):
        if PLAIN_UNET in url:
            out.write(b"some")
            raise OSError(errno.ENOSPC, "No space left on device")
        stream(url, out, size, bar)

    monkeypatch.setattr(download, "_stream", filling)
    with pytest.raises(LDMError, match=r"The disk is full, org/name/unet/.* is not whole yet"):
        fetch("org/name")
    assert hub.local("org/name") is None


# ---------------------------------------------------------------------------------------------------- who may have it


def test_a_gated_model(server, monkeypatch):
    server.add("org/name", pipeline(), gated=True)
    sentence = (
        rf"org/name is gated: accept its licence at {server.url}/org/name and log in by `hf auth login`; "
        r"or take sd15 or sdxl instead.*scenes"
    )
    for token in (None, "hf_secret"):
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(LDMError, match=sentence) as caught:
            fetch("org/name")
        assert "secret" not in str(caught.value)
    monkeypatch.setenv("HF_TOKEN", "accepted")
    todo = hub.plan("org/name")
    assert todo.gated and "(gated)" in str(todo)
    assert held(fetch("org/name")) == WANTED


def test_a_token_is_not_carried_to_another_host(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "accepted")
    server.add("org/name", pipeline())
    fetch("org/name")
    requests = [request for request in server.requests if "org/name" in request.path]
    asked = {request.path.split("/")[1]: "Authorization" in request.headers for request in requests}
    assert asked["api"] and asked["org"] and not asked["cdn"]


def test_a_token_that_is_refused(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    server.status["/api/models"] = 403
    with pytest.raises(LDMError, match=r"refuses org/name \(403\).*hf auth whoami") as caught:
        fetch("org/name")
    assert "secret" not in str(caught.value)


def test_a_model_that_vanished(server):
    with pytest.raises(LDMError, match=r"org/name is not on http.*\(removed, private, or misspelt\).*`scenes`"):
        fetch("org/name")
    with pytest.raises(LDMError, match=r"Did you mean 'stabilityai/sdxl-turbo'\?"):
        fetch("stabilityai/sdxl-tubro")


ZOO = """
[tiny]
what = "a model"
repo = "org/gone"
mirrors = ["org/also-gone", "org/name"]
formerly = ["old/name"]
licence = "mit"
instead = ["other"]
sha256 = {{ "unet/diffusion_pytorch_model.safetensors" = "{sha}" }}

[other]
what = "another"
repo = "org/other"
licence = "mit"
"""


def test_mirrors_are_tried_in_turn(server, monkeypatch, said):
    lines, say = said
    use_zoo(monkeypatch, ZOO.format(sha=sha256(content(PLAIN_UNET))))
    server.add("org/name", pipeline())
    place = hub.fetch("tiny", say=say)
    asked = server.asked("/api/models/org")
    assert [path.split("/")[4] for path in asked] == ["gone", "also-gone", "name"]
    assert ["org/gone is not on" in lines[0], "trying org/also-gone." in lines[0], "trying org/name." in lines[1]] == [
        True
    ] * 3
    assert lines[2].startswith("org/name at ") and len(lines) == 3
    assert hub.local("tiny") == place and hub.local("old/name", say=say) == place and "the same weights" in lines[3]


def test_a_former_name_leads_to_todays(server, monkeypatch, said):
    lines, say = said
    use_zoo(monkeypatch, ZOO.format(sha=sha256(content(PLAIN_UNET))))
    server.add("org/gone", pipeline())
    assert hub.fetch("old/name", say=say) == hub.local("tiny")
    assert "old/name is not on" in lines[0] and "trying org/gone" in lines[0]


def test_all_mirrors_have_vanished(server, monkeypatch):
    use_zoo(monkeypatch, ZOO.format(sha="0" * 64))
    with pytest.raises(LDMError, match=r"org/gone is not on .*mirrors \(org/also-gone, org/name\): take other instead"):
        fetch("tiny")


def test_a_mirror_with_other_weights_is_refused_before_a_byte(server, monkeypatch):
    use_zoo(monkeypatch, ZOO.format(sha="0" * 64))
    server.add("org/name", pipeline())
    with pytest.raises(LDMError, match=r"org/name lists another unet/.*do not trust it; take other"):
        fetch("tiny")
    assert not server.asked("safetensors")


def test_a_branch_of_a_known_repository_may_hold_something_else(server, monkeypatch):
    first = server.add("org/gone", pipeline())
    use_zoo(monkeypatch, ZOO.replace("org/gone", f"org/gone@{first}").format(sha=sha256(content(PLAIN_UNET))))
    server.add("org/gone", pipeline() | {PLAIN_UNET: b"newer"})
    assert (fetch("org/gone") / PLAIN_UNET).read_bytes() == b"newer"
    assert fetch("tiny").name == first and (fetch("tiny") / PLAIN_UNET).read_bytes() == content(PLAIN_UNET)


def test_no_mirror_is_tried_when_the_hub_is_down(server, monkeypatch):
    use_zoo(monkeypatch, ZOO.format(sha="0" * 64))
    server.status["/api/models"] = 500
    with pytest.raises(LDMError, match="status 500"):
        fetch("tiny")
    assert len(server.asked("/api/models/org")) == 1


def test_a_former_name_in_the_cache_is_the_same_commit(server, monkeypatch):
    commit = server.add("old/name", pipeline())
    old = fetch("old/name")
    table = '[tiny]\nwhat = "x"\nrepo = "org/name@{}"\nformerly = ["old/name"]\nlicence = "mit"'
    use_zoo(monkeypatch, table.format(commit))
    asked = len(server.requests)
    assert fetch("tiny") == old and len(server.requests) == asked


VOCAB = """
[clip-vocab]
what = "x"
repo = "org/name"
mirrors = ["https://elsewhere/vocab.gz"]
licence = "mit"
files = ["vocab.json", "merges.txt"]
sha256 = {{ "merges.txt" = "{merges}", "vocab.gz" = "{plain}" }}
"""


def test_the_vocabulary_from_the_hub(server, monkeypatch):
    server.add(
        "org/name", {"vocab.json": b"{}", "merges.txt": b"a b", "model.safetensors": b"big", "config.json": b"{}"}
    )
    use_zoo(monkeypatch, VOCAB.format(merges=sha256(b"a b"), plain="0" * 64))
    place = fetch("clip-vocab")
    assert held(place) == ["merges.txt", "vocab.json"] and hub.local("clip-vocab") == place
    use_zoo(monkeypatch, VOCAB.format(merges="0" * 64, plain="0" * 64))
    with pytest.raises(LDMError, match=r"org/name/merges.txt: .*hash differs"):
        fetch("clip-vocab", update=True)
    assert hub.local("clip-vocab") is None


@pytest.mark.parametrize("why", ["down", "vanished", "no huggingface_hub"])
def test_the_vocabulary_from_elsewhere(server, monkeypatch, said, why, tmp_path):
    lines, say = said
    use_zoo(monkeypatch, VOCAB.format(merges="0" * 64, plain=sha256(b"plain")))
    if why == "down":
        server.status["/api/models"] = 500
    elif why == "no huggingface_hub":
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    opened = []

    def urlopen(url, timeout):
        import io

        opened.append(url)
        return io.BytesIO(b"plain" if len(opened) > 1 else b"other")

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    with pytest.raises(LDMError, match="not what ldm knows"):
        hub.fetch("clip-vocab", say=say)
    place = hub.fetch("clip-vocab", say=say)
    assert place == tmp_path / "own" / "ldm" / "vocab.gz" and place.read_bytes() == b"plain"
    assert "trying https://elsewhere/vocab.gz." in lines[0] and hub.local("clip-vocab") == place and len(opened) == 2


# ---------------------------------------------------------------------------------------------------- offline


def test_offline_without_the_files(server, monkeypatch):
    server.add("org/name", pipeline())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        LDMError, match=r"^org/name is not \(wholly\) in the cache, and HF_HUB_OFFLINE is set.*ldm fetch org/name"
    ):
        fetch("org/name")
    assert not server.requests


def test_offline_one_settles_for_what_is_here(server, monkeypatch):
    server.add("org/name", pipeline())
    place = fetch("org/name", "fp16")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert hub.local("org/name") is None and fetch("org/name") == place


def test_without_huggingface_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(LDMError, match=re.escape(client.INSTALL)):
        hub.fetch("org/name")


# ---------------------------------------------------------------------------------------------------- other processes


def start(server, home: Path, code: str, **more: str) -> subprocess.Popen:
    """A program of its own, with huggingface_hub's real environment variables."""
    mine = {
        "HF_HOME": str(home), "HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0",
        "XDG_CACHE_HOME": str(home / "own"), "NO_PROXY": "*", "PYTHONPATH": os.environ.get("PYTHONPATH", str(ROOT)),
    }  # fmt: skip
    environment = os.environ | mine | more
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    if os.name == "posix":  # what runs in the background ignores Ctrl-C, and so would its children
        pipes["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen([sys.executable, "-c", code], env=environment, **pipes)


FETCH = "from ldm import hub; print(hub.fetch('org/name'))"
COMMAND = "import sys; from ldm.cli import main; sys.exit(main(['fetch', 'org/name']))"


def wait_for(condition) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "it didn't come about"
        time.sleep(0.01)


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGINT])
def test_a_program_that_was_killed_goes_on(tmp_path, blow):
    with HubServer() as server:
        server.add("org/name", pipeline())
        server.slow = 0.3
        program = start(server, tmp_path, COMMAND)
        cache = tmp_path / "hub" / "models--org--name"
        wait_for(lambda: any(part.stat().st_size >= 65536 for part in cache.glob("blobs/*.ldm-part")))
        program.send_signal(blow)
        _, err = program.communicate(timeout=20)
        assert program.returncode == (-signal.SIGKILL if blow == signal.SIGKILL else STOPPED)
        assert ("the same command goes on from there" in err) == (blow == signal.SIGINT) and "Traceback" not in err
        (part,) = cache.glob("blobs/*.ldm-part")
        size = part.stat().st_size
        assert 65536 <= size < 300_001
        server.slow = 0.0
        again = start(server, tmp_path, FETCH)
        out, _ = again.communicate(timeout=20)
        assert again.returncode == 0 and held(Path(out.strip())) == WANTED
        assert f"bytes={size}-" in [request.headers.get("Range") for request in server.requests]
        assert not list(cache.glob("blobs/*.ldm-part"))
        if blow == signal.SIGINT:
            return
        offline = start(server, tmp_path, FETCH, HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9")
        assert offline.communicate(timeout=20)[0] == out


def test_two_programs_at_once(tmp_path):
    with HubServer() as server:
        files = pipeline()
        server.add("org/name", files)
        server.slow = 0.02
        programs = [start(server, tmp_path, FETCH) for _ in range(2)]
        outs = [program.communicate(timeout=30) for program in programs]
        assert [program.returncode for program in programs] == [0, 0], outs
        place = Path(outs[0][0].strip())
        assert outs[0][0] == outs[1][0] and all((place / name).read_bytes() == files[name] for name in WANTED)
        for name in ("text_encoder/model.safetensors", PLAIN_UNET):
            assert len([path for path in server.asked(name) if path.startswith("/cdn/")]) == 1


def test_two_threads_at_once(server):
    server.add("org/name", pipeline())
    server.slow = 0.01
    places = []
    threads = [threading.Thread(target=lambda: places.append(fetch("org/name"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(places) == 3 and len({*places}) == 1 and held(places[0]) == WANTED
    assert len(server.asked("/cdn/")) == 3  # large files, each once


def test_what_one_has_put_there_no_other_takes_away(server, monkeypatch):
    """Both find no file; one has made its link, and hasn't looked at it yet, when the other clears the way for its own.

    The waiting here makes them meet, if they can.
    """
    import huggingface_hub

    server.add("org/name", pipeline())
    link, fetch_blob = huggingface_hub.hf_hub_download, download._fetch_blob
    both, made, came, failed = threading.Event(), threading.Event(), [], []

    def blob(repo, commit, file):
        fetch_blob(repo, commit, file)
        if file.name == PLAIN_UNET:
            came.append(file)
            if len(came) == 2:
                both.set()
                made.wait(5)
            else:
                both.wait(0.5)

    def slow(repo, name, **options):
        if name == PLAIN_UNET and made.is_set():  # of the second: until then its way is clear, and no link there
            time.sleep(0.5)
        place = link(repo, name, **options)
        if name == PLAIN_UNET:
            made.set()
            time.sleep(0.2)
        return place

    def run():
        try:
            fetch("org/name")
        except Exception as error:
            failed.append(error)

    monkeypatch.setattr(download, "_fetch_blob", blob)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", slow)
    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert came and not failed


# ---------------------------------------------------------------------------------------------------- the command


def run(*words: str) -> int:
    import argparse

    from ldm.cli import fetch as command
    from ldm.cli.options import Parser

    top = Parser(prog="ldm")
    command.add(top.add_subparsers())
    args: argparse.Namespace = top.parse_args(["fetch", *words])
    args.run(args)
    return 0


def test_the_command_fetches(server, capsys):
    server.add("org/name", pipeline())
    with pytest.raises(LDMError, match="neither a name"):
        run("org/name", "sd16")
    assert not server.asked("org/")  # the mistake is told first
    run("org/name", "--dry-run")
    shown = capsys.readouterr().out
    assert all(name in shown for name in WANTED) and "300.0 kB" in shown and "licence: openrail++" in shown
    assert not server.asked("safetensors") and "here:" not in shown
    run("org/name")
    shown = capsys.readouterr().out
    assert f"org/name is here: {hub.local('org/name')}" in shown
    assert shown.endswith("\nldm inspect org/name   # tells what is wrong with it\n")  # its files hold nothing real
    asked = len(server.requests)
    run("org/name")
    assert len(server.requests) == asked and "to fetch" not in capsys.readouterr().out


def test_a_licence_moves_no_cursor(server, capsys):
    """It is a tag that a stranger wrote."""
    server.add("org/name", pipeline(), licence="mit\x1b]0;owned\x07\nldm: all is well")
    run("org/name", "--dry-run")
    shown = capsys.readouterr().out
    assert r"licence: mit\x1b]0;owned\x07\nldm: all is well" in shown
    assert all(char.isprintable() for char in shown.replace("\n", "")) and "\nldm:" not in shown


@pytest.mark.parametrize("name", ["model_index.json", "unet/diffusion_pytorch_model.safetensors.index.json"])
def test_no_giant_is_downloaded_to_be_read(server, name):
    """`plan` reads some JSON before anybody has agreed to a size."""
    files = pipeline(without=(PLAIN_UNET, HALF_UNET)) | {name: b" " * (MOST_JSON_BYTES + 1)}
    server.add("org/name", files)
    with pytest.raises(LDMError, match=rf"org/name lists {name} with 10.0 MB: it is no such file of a model"):
        hub.plan("org/name")
    assert name not in fetched(server)


def test_the_command_lists_the_zoo(server, capsys):
    run()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(zoo.zoo()) + 1 and lines[0].split() == [
        "name",
        "here",
        "size",
        "licence",
        "what",
        "it",
        "is",
    ]
    assert any(line.startswith("sdxl ") and "openrail++" in line for line in lines) and not server.requests
    with pytest.raises(SystemExit):
        run("--dry-run")


def test_a_fetched_model_draws(server, tmp_path):
    from tiny import tiny_model

    import ldm

    (tmp_path / "tiny").mkdir()
    model = tiny_model(tmp_path / "tiny")
    server.add("org/name", {name: (model / name).read_bytes() for name in held(model)})
    one, other, again = (ldm.load(name)("a house", steps=2).images[0] for name in (model, "org/name", "org/name"))
    assert one.tobytes() == other.tobytes() == again.tobytes() and len({*one.getdata()}) > 10
    assert len(server.asked("/api/models/org")) == 1


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_the_command_says_how_to_draw(server, tmp_path, capsys, variant):
    from tiny import tiny_model

    (tmp_path / "tiny").mkdir()
    model = tiny_model(tmp_path / "tiny")
    if variant:
        for file in model.rglob("*.safetensors"):
            file.rename(file.with_suffix(".fp16.safetensors"))
    server.add("org/name", {name: (model / name).read_bytes() for name in held(model)})
    run("org/name", *(["--variant", variant] if variant else []))
    more = f" --variant {variant}" if variant else ""
    assert capsys.readouterr().out.endswith(f'\nldm generate "a lighthouse at dusk" --model org/name{more}\n')
