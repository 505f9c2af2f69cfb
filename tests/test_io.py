"""Files: what is written is whole, what is read is checked, every error says what to do."""

import errno
import json
import os
import random
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm.errors import LDMError
from ldm.io.atomic import atomic_file, atomic_folder
from ldm.io.folders import folder_hash, read_json, write_json
from ldm.io.png import read_settings, save_png

ROOT = Path(__file__).parents[1]


def no_rubbish(folder):
    return not [p for p in Path(folder).rglob("*") if ".ldm-tmp" in p.name or ".old-" in p.name]


# ---------------------------------------------------------------------------------------------------- atomic files


@pytest.mark.parametrize("mode, old, new", [("wb", b"old", b"new"), ("w", "old", "nü")])
def test_atomic_file_replaces(tmp_path, mode, old, new):
    path = tmp_path / "a.bin"
    for content in (old, new):
        with atomic_file(path, mode) as file:
            file.write(content)
    assert path.read_bytes() == (new if mode == "wb" else new.encode())
    assert no_rubbish(tmp_path)
    (tmp_path / "plain").write_bytes(b"")
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode  # not mkstemp's 0600


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_atomic_file_keeps_the_old_one_after_an_error(tmp_path, error):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(error), atomic_file(path) as file:
        file.write(b"half of the n")
        raise error
    assert path.read_bytes() == b"old" and no_rubbish(tmp_path)


def test_atomic_file_says_what_is_wrong(tmp_path, monkeypatch):
    with pytest.raises(LDMError, match=r"no/such does not exist; create it first"), atomic_file(tmp_path / "no/such/a"):
        pass
    with pytest.raises(LDMError, match=r"a folder of that name stands there"), atomic_file(tmp_path):
        pass
    with pytest.raises(ValueError, match=r"mode"), atomic_file(tmp_path / "a", "ab"):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(LDMError, match=r"Not a directory; choose another place"), atomic_file(tmp_path / "file/a"):
        pass
    with pytest.raises(FileNotFoundError), atomic_file(tmp_path / "a"):  # somebody else's error stays what it is
        (tmp_path / "absent").read_bytes()
    with pytest.raises(LDMError, match=r"the disk is full"), atomic_file(tmp_path / "a"):
        raise OSError(errno.ENOSPC, "No space left on device")

    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(LDMError, match=r"no permission to write in"), atomic_file(tmp_path / "a"):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


def run(code, *args):
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.skipif(sys.platform != "linux", reason="resource limits")
def test_a_full_disk_leaves_the_old_file(tmp_path):
    code = """if True:
        import resource, signal, sys
        from ldm.errors import LDMError
        from ldm.io.atomic import atomic_file
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        for limit in range(0, 100_000, 5_000):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            try:
                with atomic_file(sys.argv[1]) as file:
                    for _ in range(100):
                        file.write(bytes(1_000))
            except LDMError as error:
                assert "the disk is full" in str(error), error
            else:
                raise AssertionError(limit)
    """
    (tmp_path / "a").write_bytes(b"old")
    result = run(code, tmp_path / "a")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "a").read_bytes() == b"old" and no_rubbish(tmp_path)


WRITE_FOR_EVER = """if True:
    import sys
    from pathlib import Path
    from ldm.io.atomic import atomic_file, atomic_folder
    place = Path(sys.argv[1])
    for i in range(10**9):
        text = str(i) * 200_000
        with atomic_file(place / "file", "w") as file:
            file.write(text)
        with atomic_folder(place / "folder") as folder:
            for name in "abc":
                (folder / name).write_text(text)
        print(i, flush=True)
"""


def test_sigkill_leaves_whole_files_and_folders(tmp_path):
    chance = random.Random(0)
    for _ in range(25):
        process = subprocess.Popen([sys.executable, "-c", WRITE_FOR_EVER, tmp_path], cwd=ROOT, stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(chance.uniform(0, 0.03))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        text = (tmp_path / "file").read_text()
        assert text and text == str(int(text[: len(text) // 200_000])) * 200_000
        texts = {p.name: p.read_text() for p in (tmp_path / "folder").iterdir()}
        assert sorted(texts) == ["a", "b", "c"] and len(set(texts.values())) == 1 and len(texts["a"]) >= 200_000


@pytest.mark.parametrize("exchange", [True, False])
def test_atomic_folder(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr("ldm.io.atomic._exchange", lambda *_: False)
    target = tmp_path / "checkpoint"
    for content in ("one", "two", "three"):
        with atomic_folder(target) as folder:
            (folder / content).write_text(content)
            (folder / "deep").mkdir()
            (folder / "deep" / "file").write_text(content)
            assert folder.parent == tmp_path and not (target / content).exists()
        assert sorted(p.name for p in target.iterdir()) == sorted(["deep", content])
        assert (target / "deep" / "file").read_text() == content and no_rubbish(tmp_path)
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), atomic_folder(target) as folder:
            (folder / "four").write_text("")
            raise error
    assert (target / "three").exists() and not (target / "four").exists() and no_rubbish(tmp_path)


def test_atomic_folder_puts_the_old_one_back(tmp_path, monkeypatch):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "old").write_text("")
    monkeypatch.setattr("ldm.io.atomic._exchange", lambda *_: False)
    rename, calls = os.rename, []

    def second_fails(a, b):
        calls.append(a)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")
        rename(a, b)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(LDMError, match=r"Input/output error"), atomic_folder(tmp_path / "checkpoint"):
        pass
    assert (tmp_path / "checkpoint" / "old").exists() and no_rubbish(tmp_path)


def test_atomic_folder_says_what_is_wrong(tmp_path):
    with pytest.raises(LDMError, match=r"does not exist; create it first"), atomic_folder(tmp_path / "no/folder"):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(LDMError, match=r"something else of that name stands there"), atomic_folder(tmp_path / "file"):
        pass
    with pytest.raises(LDMError, match=r"the disk is full"), atomic_folder(tmp_path / "a"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


# ---------------------------------------------------------------------------------------------------- JSON and hashes


def test_json_round_trip(tmp_path):
    thing = {"b": [1, 2.5, None, True], "a": "fjörd 冬", "deep": {"x": {}}}
    write_json(tmp_path / "a.json", thing)
    assert read_json(tmp_path / "a.json") == thing and list(read_json(tmp_path / "a.json")) == ["b", "a", "deep"]


@pytest.mark.parametrize("bad", [{"a": object()}, {"a": float("nan")}, {"a": "\ud800"}])
def test_json_that_cannot_be_written(tmp_path, bad):
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(LDMError, match=r"a.json: not expressible as JSON"):
        write_json(tmp_path / "a.json", bad)
    assert (tmp_path / "a.json").read_text() == "{}"


@pytest.mark.parametrize(
    "content, message",
    [
        (b'{"a": 1,\n  "b" 2}', r"not valid JSON at line 2, column 7 .*mend it there"),
        (b"", r"not valid JSON at line 1, column 1"),
        (b'{"a": 1, "a": 2}', r"the name 'a' stands twice"),
        (b'{"a": NaN}', r"NaN is not a JSON number"),
        (b"[" * 100_000, r"not acceptable JSON|not valid JSON"),
        (b'{"a": "\xff"}', r"not UTF-8 text \(byte 7\)"),
    ],
)
def test_json_that_cannot_be_read(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(LDMError, match=rf"a\.json is {message}|a\.json.*{message}"):
        read_json(tmp_path / "a.json")


def test_json_that_is_not_there_or_too_large(tmp_path):
    with pytest.raises(LDMError, match=r"a\.json does not exist: check the path"):
        read_json(tmp_path / "a.json")
    with pytest.raises(LDMError, match=r"is a folder, not a file"):
        read_json(tmp_path)
    with open(tmp_path / "big.json", "wb") as file:
        file.truncate(20_000_001)
    with pytest.raises(LDMError, match=r"larger than 10000000 bytes"):
        read_json(tmp_path / "big.json")


def test_folder_hash(tmp_path):
    def build(name, files):
        for file, content in files.items():
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_text(content)
        return folder_hash(tmp_path / name)

    files = {"unet/a.safetensors": "12", "unet/config.json": "{}", "model_index.json": "{}", "merges.txt": "x"}
    first = build("first", files)
    assert len(first) == 16 and int(first, 16) >= 0
    others = {"README.md": "!", "optimizer.safetensors": "!", "training_state.json": "!", ".cache/x.json": "!"}
    assert build("second", dict(reversed(files.items())) | others) == first
    assert build("content", files | {"merges.txt": "y"}) != first
    assert build("moved", files | {"unet/a.safetensors": "1", "unet/config.json": "2{}"}) != first
    assert build("name", {k.replace("unet", "vae"): v for k, v in files.items()}) != first
    assert build("more", files | {"vae/a.safetensors": ""}) != first


def test_folder_hash_says_what_is_wrong(tmp_path):
    with pytest.raises(LDMError, match=r"There is no folder"):
        folder_hash(tmp_path / "no")
    with pytest.raises(LDMError, match=r"holds no model files"):
        folder_hash(tmp_path)


# ---------------------------------------------------------------------------------------------------- pictures

SETTINGS = {
    "prompt": "fjörd 冬 \x1b[2J \u202e",
    "seed": 7,
    "guidance": 7.5,
    "model": "0123456789abcdef",
    "size": [8, 4],
}


def picture(mode="RGB"):
    return Image.effect_noise((8, 4), 50).convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_png_round_trip(tmp_path, mode):
    image = picture(mode)
    save_png(image, tmp_path / "a.png", SETTINGS)
    assert read_settings(tmp_path / "a.png") == SETTINGS and no_rubbish(tmp_path)
    with Image.open(tmp_path / "a.png") as again:
        assert again.mode == mode and again.tobytes() == image.tobytes()
        assert json.loads(again.text["ldm"]) == SETTINGS


def test_png_that_cannot_be_written(tmp_path):
    with pytest.raises(LDMError, match=r"a\.jpg: only PNG keeps the settings"):
        save_png(picture(), tmp_path / "a.jpg", SETTINGS)
    with pytest.raises(LDMError, match=r"PNG has no mode 'CMYK'; convert the image to RGB"):
        save_png(picture("CMYK"), tmp_path / "a.png", SETTINGS)
    for bad in ({"a": object()}, {"a": float("nan")}):
        with pytest.raises(LDMError, match=r"settings are not expressible as JSON"):
            save_png(picture(), tmp_path / "a.png", bad)
    for bad in ({"a": "x" * 1_000_000}, ["no", "dict"]):
        with pytest.raises(LDMError, match=r"settings must be a dict of at most 1000000 bytes"):
            save_png(picture(), tmp_path / "a.png", bad)
    with pytest.raises(LDMError, match=r"does not exist; create it first"):
        save_png(picture(), tmp_path / "no/a.png", SETTINGS)
    assert not list(tmp_path.iterdir())


def with_text(path, *texts, **how):
    info = PngInfo()
    for text in texts:
        info.add_text("ldm", text, **how)
    picture().save(path, pnginfo=info)
    return path


@pytest.mark.parametrize(
    "texts, how, message",
    [
        ([], {}, "holds no settings of ldm"),
        (["{}", "{}"], {}, "holds the text chunk 'ldm' twice"),
        (["[1]"], {}, "is a list, not a table of settings"),
        (['{"a": }'], {}, "the text chunk 'ldm' is not valid JSON at line 1, column 7"),
        (["[" * 100_000], {}, "is not acceptable JSON|is not valid JSON"),
        (["x" * 1_000_001], {}, "holds the text chunk 'ldm' over 1000000 bytes"),
        (["x" * 50_000_000], {"zip": True}, "holds the text chunk 'ldm' compressed"),
    ],
)
def test_png_whose_settings_are_not_sound(tmp_path, texts, how, message):
    with pytest.raises(LDMError, match=rf"a\.png.*({message})"):
        read_settings(with_text(tmp_path / "a.png", *texts, **how))


def test_png_that_is_damaged(tmp_path):
    path, whole = tmp_path / "a.png", with_text(tmp_path / "whole.png", '{"a": 1}').read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(LDMError, match=r"a\.png is (truncated|not a PNG)"):
            read_settings(path)
    path.write_bytes(whole.replace(b'{"a": 1}', b'{"a": 2}'))
    with pytest.raises(LDMError, match=r"is damaged \(check sum of the chunk 'ldm'\)"):
        read_settings(path)
    path.write_bytes(whole.replace(b'{"a": 1}', b'{"\xff": 1'[:8].ljust(8)))
    with pytest.raises(LDMError, match=r"is damaged"):
        read_settings(path)
    body = b'tEXtldm\0{"\xff": 1}'
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    path.write_bytes(whole[:33] + chunk + whole[33:][struct.unpack(">I", whole[33:37])[0] + 12 :])
    with pytest.raises(LDMError, match=r"is not acceptable JSON"):
        read_settings(path)
    for other in (b"", b"GIF89a", b"\xff\xd8\xff"):
        path.write_bytes(other)
        with pytest.raises(LDMError, match=r"is not a PNG: name a picture that ldm wrote"):
            read_settings(path)
    with pytest.raises(LDMError, match=r"b\.png does not exist"):
        read_settings(tmp_path / "b.png")
