"""One file from the hub into huggingface_hub's cache: resumed where it was cut, checked before it has its name there.

The cache is that of every Hugging Face library, laid out as they lay it out:

    models--org--name/blobs/<hash>              contents, each named by its hash (large files: SHA-256)
    models--org--name/snapshots/<commit>/...    links to them, by their names in the repository
    models--org--name/refs/main                 the commit that a branch stood at

huggingface_hub takes up a cut connection within one call, but forgets what it has when the process ends. Here a large
file grows as blobs/<hash>.ldm-part; whoever comes next goes on from there, whatever ended the last one. It is fetched
by plain HTTP, also where the hub offers Xet: ranges, mirrors and hashes work everywhere then.
"""

import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ldm.errors import LDMError, bytes_in_words
from ldm.hub.client import Unavailable, explained, http_errors, library
from ldm.io.atomic import atomic_file

BLOCK = 1 << 20


@dataclass(frozen=True)
class File:
    """One file of a repository at a commit."""

    name: str
    size: int
    sha256: str = ""  # of large files, as the hub lists it
    git: str = ""  # of small ones: git's SHA-1 of the blob
    known: str = ""  # the SHA-256 that ldm knows, whoever serves it


def storage(repo: str) -> Path:
    """Where the cache keeps a repository."""
    return Path(library().constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"


# ---------------------------------------------------------------------------------------------------- one file


def download(repo: str, commit: str, file: File) -> Path:
    """The file's place in the cache's snapshot, fetched if it isn't there. Raises LDMError; the cache stays whole."""
    place = storage(repo) / "snapshots" / commit / file.name

    def is_here() -> bool:
        return is_whole(place, file) and bool(file.sha256 or _is_same(place, file))

    if is_here():
        return place
    # One program at a time, or it would take away what another has just put there.
    with explained(repo, file.name), locked(repo, f"{commit}.ldm"):
        if is_here():
            return place
        if file.sha256:
            _fetch_blob(repo, commit, file)
            place.unlink(missing_ok=True)  # a link to what was there before
        else:
            remove(place)
        place = Path(library().hf_hub_download(repo, file.name, revision=commit))
    _check(place, repo, file)
    return place


@contextmanager
def locked(repo: str, name: str) -> Iterator[None]:
    """Wait until no other program is at it: a lock of that name among huggingface_hub's own."""
    from huggingface_hub.utils import WeakFileLock

    folder = storage(repo).parent / ".locks" / storage(repo).name
    folder.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(folder / f"{name}.lock"):
        yield


def is_whole(place: Path, file: File) -> bool:
    return place.is_file() and place.stat().st_size == file.size


def _fetch_blob(repo: str, commit: str, file: File) -> None:
    """Put a large file's content into the cache, under its hash: hf_hub_download then only links it."""
    blob = storage(repo) / "blobs" / file.sha256
    part = blob.with_name(blob.name + ".ldm-part")
    blob.parent.mkdir(parents=True, exist_ok=True)
    with locked(repo, file.sha256):  # by which huggingface_hub downloads it, too
        if is_whole(blob, file):  # another process was faster
            return
        if part.exists() and part.stat().st_size > file.size:
            part.unlink()
        with open(part, "r+b" if part.exists() else "w+b") as out:
            try:
                _go_on(repo, commit, file, out)
            finally:  # also on Ctrl-C: what came is kept
                out.flush()
                os.fsync(out.fileno())
        if _sha256(part) != file.sha256:
            part.unlink()
            raise LDMError(f"{repo}/{file.name}: {WRONG}")
        os.replace(part, blob)  # a blob of the wrong size gives way, too


def _go_on(repo: str, commit: str, file: File, out: BinaryIO) -> None:
    """Fetch what `out` still lacks; a cut connection is taken up again as long as something comes."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import tqdm

    url, stalled, error = hf_hub_url(repo, file.name, revision=commit), 0, None
    most = done = out.seek(0, os.SEEK_END)
    with tqdm(total=file.size, initial=done, unit="B", unit_scale=True, desc=file.name) as bar:
        while done < file.size:
            try:
                _stream(url, out, file.size, bar)
            except http_errors() as failure:
                error = failure
                _raise_unless_passing(failure, out)
            done = out.tell()
            stalled = 0 if done > most else stalled + 1
            most = max(most, done)
            if stalled > TRIES:
                raise error or ConnectionError("empty answers")
            time.sleep(stalled * WAIT)
    if done > file.size:
        out.truncate(0)
        raise LDMError(f"{repo}/{file.name}: what came is longer than the hub lists, and was removed: run it again.")


TRIES, WAIT = 4, 1.0  # without a byte coming; seconds, times the number of the try


def _raise_unless_passing(error: Exception, out: BinaryIO) -> None:
    """Raise what trying again will not mend: an answer that isn't one of "too many" or "something is broken here"."""
    status = error.response.status_code if getattr(error, "response", None) is not None else 503
    if status == 416:  # nothing beyond what is here: the part is not of that file
        out.truncate(0)
    if status not in (408, 429) and status < 500:
        raise error


def _stream(url: str, out: BinaryIO, size: int, bar: Any) -> None:
    from huggingface_hub import constants, get_session
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    # A compressed answer would have another length, and no ranges. A token doesn't follow a redirect to another host.
    headers = {**build_hf_headers(), "Accept-Encoding": "identity", "Range": f"bytes={out.tell()}-"}
    with get_session().stream("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as answer:
        if answer.status_code >= 400:
            answer.read()
        hf_raise_for_status(answer)
        if answer.status_code != 206:  # a server without ranges begins anew
            out.seek(0)
            out.truncate()
            bar.reset(size)
        for block in answer.iter_bytes():
            out.write(block)
            bar.update(len(block))
            if out.tell() > size:
                return


WRONG = (
    "what came is not what it should be (its hash differs) and was removed: run it again; if it happens twice, "
    "do not trust this source."
)


def _check(place: Path, repo: str, file: File) -> None:
    """Hold what huggingface_hub fetched or linked against the listing. Raises LDMError; a wrong one is removed."""
    right = is_whole(place, file) and (
        (place.resolve().name == file.sha256 or _sha256(place) == file.sha256) if file.sha256 else _is_same(place, file)
    )
    if not right:
        remove(place)
        raise LDMError(f"{repo}/{file.name}: {WRONG}")


def _is_same(place: Path, file: File) -> bool:
    """Whether a small file has the hashes that are known of it; a hub may list none."""
    data = place.read_bytes()
    git = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    return file.git in ("", git) and file.known in ("", hashlib.sha256(data).hexdigest())


def remove(place: Path) -> None:
    """Remove a file from the cache, with the content that its link points to."""
    for path in {place.resolve(), place}:
        with suppress(FileNotFoundError):
            path.unlink()


def _sha256(path: Path) -> str:
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            sha.update(block)
    return sha.hexdigest()


def download_plain(url: str, sha256: str, place: Path) -> Path:
    """A small file from a plain URL: whole and of this hash, or not at all."""
    from urllib.error import URLError
    from urllib.request import urlopen

    try:
        with urlopen(url, timeout=30) as answer:
            data = answer.read(64 * BLOCK)
    except (URLError, OSError) as error:
        raise Unavailable(f"{url} cannot be read ({getattr(error, 'reason', error)}): run it again later.") from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise LDMError(f"{url}: what came is not what ldm knows (its SHA-256 differs), and was not kept.")
    place.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(place) as file:
        file.write(data)
    return place


def is_right(path: Path, sha256: str) -> bool:
    return path.is_file() and _sha256(path) == sha256


# ---------------------------------------------------------------------------------------------------- disk


def check_space(repo: str, files: list[File]) -> None:
    """Raises LDMError if the files that are still to come don't fit on the disk of the cache."""
    blobs = storage(repo) / "blobs"
    parts = [blobs / f"{file.sha256}.ldm-part" for file in files]
    done = sum(part.stat().st_size for part in parts if part.exists())
    needed = sum(file.size for file in files) - done
    there = next(folder for folder in (blobs, *blobs.parents) if folder.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise LDMError(
            f"{repo} needs {bytes_in_words(needed)} and {there} has {bytes_in_words(free)} free: make room, or put the "
            "cache elsewhere (HF_HOME)."
        )
