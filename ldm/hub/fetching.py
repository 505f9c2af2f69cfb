"""A name becomes files on this machine: a model of the zoo, or an address on the hub (`zoo.parse`).

    place = hub.local("sd15") or hub.fetch("sd15", variant="fp16")

`local` only looks, and never opens a connection. `fetch` asks the hub what a repository holds, takes the files that ldm
reads at one commit, says how much and under which licence before, and checks each file against its listed hash.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from ldm.errors import LDMError, bytes_in_words, nearest, say_on_stderr
from ldm.hub.client import Gated, Unavailable, Vanished, endpoint, explained, is_installed, is_offline, library
from ldm.hub.download import (
    File,
    check_space,
    download,
    download_plain,
    is_right,
    is_whole,
    storage,
)
from ldm.hub.wanted import SAFE, Missing, OnlyPickles, check_single, choose
from ldm.hub.zoo import COMMIT, Address, Model, entry_of, parse, zoo
from ldm.io.atomic import atomic_file
from ldm.io.folders import MOST_JSON_BYTES, read_fields, write_json

__all__ = ["Address", "Plan", "fetch", "local", "parse", "plan"]

Say = Callable[[str], None]
EMBEDDED = "the embedded `scenes`, which needs no download"


@dataclass(frozen=True)
class Plan:
    """What fetching comes to: the files at one commit, and whose they are."""

    source: Address
    commit: str
    licence: str
    files: tuple[File, ...]
    gated: bool = False
    note: str = ""  # the zoo's

    @property
    def missing(self) -> list[File]:
        return [file for file in self.files if not is_whole(self.snapshot / file.name, file)]

    @property
    def snapshot(self) -> Path:
        return storage(self.source.repo) / "snapshots" / self.commit if self.commit else own_folder()

    @property
    def place(self) -> Path:
        """The folder, or the single file, that the address then stands for."""
        return self.snapshot / self.source.path

    def __str__(self) -> str:
        total = sum(file.size for file in self.missing)
        gate = " (gated)" if self.gated else ""
        commit = f" at {self.commit[:12]}" if self.commit else ""
        count = len(self.missing)
        what = f"{bytes_in_words(total)} in {count} file{'s' * (count != 1)}" if self.commit else "a small file"
        where, note = self.source.url or self.source.repo, f" Note: {self.note}." * bool(self.note)
        return f"{where}{commit}: {what} to fetch; licence: {self.licence or '?'}{gate}.{note}"


# ---------------------------------------------------------------------------------------------------- what is here


def local(
    asked: str | Path | Address,
    variant: str | None = None,
    allow_pickle: bool = False,
    say: Say = say_on_stderr,
    settle: bool = False,
) -> Path | None:
    """The folder or file of an address, if all that ldm reads of it is in the cache; None otherwise.

    Not one request is made. `variant` as in `ldm.load`; if it isn't here, and the hub may have it, that is None, too,
    unless one is to `settle` for what is here.
    """
    sources, model = sources_of(asked)
    named = model is not None and sources[0] == model.sources[0]
    for i, source in enumerate(sources + (_former(model) if named else [])):
        if place := _cached(source, model, variant, allow_pickle, settle):
            if i and not named:
                say(f"{asked} is not here; taking {source}, the same weights.")
            return place
    return None


def sources_of(asked: str | Path | Address) -> tuple[list[Address], Model | None]:
    """Where to look, in order, and the zoo's entry. Raises LDMError for what is neither a name nor an address."""
    wanted = asked if isinstance(asked, Address) else parse(asked)
    if wanted is None:
        raise LDMError(
            f"{str(asked)!r} is neither a name of the zoo (`ldm fetch` lists them) nor an address (org/name)."
            + nearest(str(asked), zoo())
        )
    model = zoo().get(str(asked)) or entry_of(wanted)
    if model is not None and wanted == model.sources[0]:
        return model.sources, model
    others = model.sources if model and wanted.revision == "main" else []
    return [wanted, *(source for source in others if source.repo != wanted.repo)], model


def _former(model: Model) -> list[Address]:
    """The same commit under the repository's former name: a commit names its content."""
    first = model.sources[0]
    return [Address(old, first.revision, first.path) for old in model.formerly if COMMIT.fullmatch(first.revision)]


def _cached(source: Address, model: Model | None, variant: str | None, allow_pickle: bool, settle: bool) -> Path | None:
    if source.url:
        place = own_folder() / source.path
        return place if is_right(place, model.sha256[source.path]) else None
    if not is_installed():
        return None
    commit = _commit_here(source)
    snapshot = storage(source.repo) / "snapshots" / (commit or "-")
    if not snapshot.is_dir():
        return None
    listed = _read_listing(source.repo, commit)
    here = {path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()}

    def read(name: str) -> dict:
        if name not in here:
            raise Missing(name)
        try:
            return read_fields(snapshot / name)
        except LDMError as error:  # damaged: fetched again
            raise Missing(str(error)) from error

    try:
        exact = listed is None and not settle
        names = here if listed is None or settle else listed
        wanted = _choose(source, model, names, read, variant, allow_pickle, exact)
    except Missing as error:
        if settle and isinstance(error, OnlyPickles):
            raise
        return None
    whole = here.issuperset(wanted) and all(
        (snapshot / name).stat().st_size == listed[name] for name in wanted if listed and name in listed
    )
    return snapshot / source.path if whole else None


def _choose(
    source: Address,
    model: Model | None,
    names: set | dict,
    read: Callable,
    variant: str | None,
    pickle: bool,
    exact: bool,
) -> list[str]:
    if source.path:
        check_single(source.path, names, source.repo, pickle)
        return [source.path]
    if model is not None and model.files:
        if lacking := [name for name in model.files if name not in names]:
            raise Missing(f"{source.repo} lacks {lacking[0]}.")
        return list(model.files)
    return choose(names, read, source.repo, variant, pickle, exact)


def _commit_here(source: Address) -> str:
    """The commit that a revision stood at when it was last fetched, or ""."""
    if COMMIT.fullmatch(source.revision):
        return source.revision
    with suppress(OSError, UnicodeDecodeError):
        text = (storage(source.repo) / "refs" / source.revision).read_text(encoding="utf-8").strip()
        return text if COMMIT.fullmatch(text) else ""
    return ""


def own_folder() -> Path:
    """Where ldm keeps what has no place in the hub's cache: listings, and files from plain URLs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ldm"


def _listing(repo: str, commit: str) -> Path:
    return own_folder() / "listings" / f"{storage(repo).name}@{commit}.json"


def _read_listing(repo: str, commit: str) -> dict[str, int] | None:
    """{file: bytes} of a whole repository as it was listed: whether a variant that isn't here exists at all."""
    path = _listing(repo, commit)
    with suppress(LDMError):
        return read_fields(path) if path.is_file() else None
    return None


# ---------------------------------------------------------------------------------------------------- fetching


def fetch(
    asked: str | Path | Address,
    variant: str | None = None,
    allow_pickle: bool = False,
    say: Say = say_on_stderr,
    update: bool = False,
) -> Path:
    """`local`, or the download that makes it so; `update` asks the hub even if a branch is here already.

    Raises LDMError if it cannot be had: with the licence's page, other models, or the line to go on.
    """
    if not update and (place := local(asked, variant, allow_pickle, say)):
        return place
    if is_offline():
        return _settled(asked, variant, allow_pickle, say)
    return carry_out(plan(asked, variant, allow_pickle, say), say)


def _settled(asked: str | Path | Address, variant: str | None, allow_pickle: bool, say: Say) -> Path:
    if place := local(asked, variant, allow_pickle, say, settle=True):
        return place
    sources, model = sources_of(asked)
    name = model.name if model and sources[0] == model.sources[0] else asked
    raise LDMError(
        f"{name} is not (wholly) in the cache, and HF_HUB_OFFLINE is set: unset it, or copy the cache of a machine on "
        f"which `ldm fetch {name}` was run; or take {EMBEDDED}."
    )


def plan(
    asked: str | Path | Address, variant: str | None = None, allow_pickle: bool = False, say: Say = say_on_stderr
) -> Plan:
    """Ask the hub what is to be fetched; of the files themselves only the small JSON ones that tell are."""
    sources, model = sources_of(asked)
    failed: list[Unavailable] = []
    for source in sources:
        if failed and not source.url and not isinstance(failed[-1], Vanished):
            continue  # no answer, or no huggingface_hub: only another host may help
        if failed:
            say(f"{str(failed[-1]).rstrip('.')}; trying {source}.")
        try:
            return _plain(source, model) if source.url else _look_up(source, model, variant, allow_pickle)
        except Unavailable as error:
            failed.append(error)
    first = failed[0]
    if not isinstance(first, Vanished):
        raise first
    tried = f", nor are its mirrors ({', '.join(map(str, sources[1:]))})" if sources[1:] else ""
    raise Vanished(f"{first}{tried}: {_instead(model, sources[0])}")


def _instead(model: Model | None, source: Address) -> str:
    names = model.instead if model and model.instead else ("sd15", "sdxl")
    ids = [other.sources[0].repo for other in zoo().values()] if model is None else []
    return f"take {' or '.join(names)} instead (`ldm fetch` lists more), or {EMBEDDED}.{nearest(source.repo, ids)}"


@contextmanager
def _gate_explained(model: Model | None, source: Address) -> Iterator[None]:
    try:
        yield
    except Gated as error:
        raise Gated(f"{error}; or {_instead(model, source)}") from error


def _plain(source: Address, model: Model) -> Plan:
    return Plan(source, "", model.licence, (File(source.path, 0, model.sha256[source.path]),), note=model.note)


def _look_up(source: Address, model: Model | None, variant: str | None, allow_pickle: bool) -> Plan:
    hub = library()
    from huggingface_hub import constants

    with _gate_explained(model, source), explained(source.repo):
        info = hub.HfApi().model_info(
            source.repo, revision=source.revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
        )
    if not COMMIT.fullmatch(info.sha or ""):
        raise Unavailable(f"{endpoint()} answers, but not as a hub does: check HF_ENDPOINT.")
    listed = {}
    for file in info.siblings or ():
        if SAFE.fullmatch(file.rfilename) and file.size is not None:
            sha = file.lfs.sha256 if file.lfs else ""
            listed[file.rfilename] = File(file.rfilename, file.size, sha, "" if sha else file.blob_id or "")

    def read(name: str) -> dict:
        size = listed[name].size
        if size > MOST_JSON_BYTES:
            raise LDMError(
                f"{source.repo} lists {name} with {bytes_in_words(size)}: it is no such file of a model, and was not "
                "downloaded; take another model."
            )
        with _gate_explained(model, source):
            return read_fields(download(source.repo, info.sha, listed[name]))

    names = _choose(source, model, listed, read, variant, allow_pickle, False)
    files = _with_known_hashes(source, model, [listed[name] for name in names])
    licence = next((tag[8:] for tag in info.tags or () if tag.startswith("license:")), "")
    with suppress(LDMError, OSError):  # a cache that cannot be written is a pity, no more
        _listing(source.repo, info.sha).parent.mkdir(parents=True, exist_ok=True)
        write_json(_listing(source.repo, info.sha), {name: file.size for name, file in listed.items()})
    licence = model.licence if model and source in model.sources else licence
    note = model.note if model and source in model.sources else ""
    return Plan(source, info.sha, licence, tuple(files), bool(info.gated), note)


def _with_known_hashes(source: Address, model: Model | None, files: list[File]) -> list[File]:
    """What the zoo knows must be what a source lists, before a byte is fetched; small files are compared afterwards.

    A branch that the zoo doesn't name may hold something else.
    """
    known = model.sha256 if model is not None and source in model.sources else {}
    for file in files:
        if file.sha256 and file.sha256 != known.get(file.name, file.sha256):
            raise LDMError(
                f"{source} lists another {file.name} than ldm knows (SHA-256 {file.sha256[:12]}... instead of "
                f"{known[file.name][:12]}...): do not trust it; {_instead(model, source)}"
            )
    return [replace(file, known=known.get(file.name, "")) for file in files]


def carry_out(todo: Plan, say: Say = say_on_stderr) -> Path:
    """Fetch what a plan lacks, file by file, and say before what it comes to."""
    model = entry_of(todo.source)
    if todo.source.url:
        say(str(todo))
        return download_plain(todo.source.url, todo.files[0].sha256, todo.place)
    if missing := todo.missing:
        say(str(todo))
        check_space(todo.source.repo, missing)
    for file in todo.files:
        with _gate_explained(model, todo.source):
            download(todo.source.repo, todo.commit, file)
    if not COMMIT.fullmatch(todo.source.revision):  # only now: until it is whole, a branch stands where it stood
        ref = storage(todo.source.repo) / "refs" / todo.source.revision
        ref.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(ref, "w") as out:
            out.write(todo.commit)
    return todo.place
