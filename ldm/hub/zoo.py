"""The zoo: models that people ask for, by short names (zoo.toml), and how an address on the hub is written.

    sd15                             a name of the zoo
    org/name                         a repository, its branch "main"
    org/name@revision                a branch, a tag or a commit of it
    org/name@revision/a/file.ckpt    one file of it; of "main" without a revision

An address becomes a path in the cache: it has plain letters only, and nothing in it climbs.
"""

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path

from ldm.errors import LDMError, nearest
from ldm.io.folders import PICKLES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TABLE = Path(__file__).with_name("zoo.toml")
SINGLE = (".safetensors", *PICKLES)  # files which are models by themselves
PART = r"(?![^/@]*(?:--|\.\.|\.git(?:[/@]|$)))[A-Za-z0-9](?:[\w.-]{0,94}[A-Za-z0-9_])?"  # as the hub allows names
ADDRESS = re.compile(
    rf"(?P<repo>{PART}/{PART})(?:@(?P<revision>[A-Za-z0-9][\w.-]*))?(?:/(?P<path>\w[\w.\-+]*(?:/\w[\w.\-+]*)*))?",
    re.ASCII,
)
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Address:
    """A place on the hub: a repository, a revision of it and, for a single file, the path inside it."""

    repo: str
    revision: str = "main"
    path: str = ""
    url: str = ""  # instead of all that: a plain file elsewhere

    def __str__(self) -> str:  # `address` reads it again
        revision = "" if self.revision == "main" else f"@{self.revision}"
        return self.url or self.repo + revision + f"/{self.path}" * bool(self.path)


@dataclass(frozen=True)
class Model:
    """One entry of zoo.toml, which explains the fields."""

    name: str
    what: str
    repo: str
    licence: str
    mirrors: tuple[str, ...] = ()
    formerly: tuple[str, ...] = ()
    gated: bool = False
    note: str = ""
    instead: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    size: str = ""
    sha256: Mapping[str, str] = field(default_factory=dict)

    @property
    def sources(self) -> list[Address]:
        return [address(text) for text in (self.repo, *self.mirrors)]


def address(text: str) -> Address:
    """The address that `text` writes out. Raises LDMError for what is none."""
    if re.fullmatch(r"https://[\w.\-/]+", text, re.ASCII):
        return Address("", "", text.rsplit("/", 1)[1], url=text)
    match = ADDRESS.fullmatch(text)
    if match is None or ".." in text:
        raise LDMError(f"{text!r} is no address on the hub: write org/name, org/name@revision or org/name/file.")
    return Address(match["repo"], match["revision"] or "main", match["path"] or "")


def parse(text: str | Path) -> Address | None:
    """The address that a name of the zoo or an address stands for, or None for what is neither ("scenes", "../x")."""
    text = str(text)
    if text in zoo():
        return zoo()[text].sources[0]
    match = ADDRESS.fullmatch(text)
    if match is None or ".." in text or (match["path"] and not text.endswith(SINGLE)):
        return None
    return address(text)


def find(name: str) -> Model:
    """The zoo's model of that name. Raises LDMError for an unknown one."""
    if name not in zoo():
        raise LDMError(f"The zoo has no model {name!r}: {', '.join(zoo())}.{nearest(name, zoo())}")
    return zoo()[name]


def entry_of(asked: str | Address) -> Model | None:
    """The zoo's entry for a name or an address of it; else for a repository that it knows by any id."""
    if str(asked) in zoo():
        return zoo()[str(asked)]
    wanted = asked if isinstance(asked, Address) else parse(asked)
    for model in zoo().values():
        if wanted in model.sources:
            return model
    for model in zoo().values():
        known = [(source.repo, source.path) for source in model.sources if not source.url]
        if wanted is not None and (wanted.repo, wanted.path) in known + [(old, "") for old in model.formerly]:
            return model
    return None


@lru_cache(maxsize=1)
def zoo() -> dict[str, Model]:
    return read_zoo(TABLE.read_text(encoding="utf-8"), str(TABLE))


def read_zoo(text: str, place: str) -> dict[str, Model]:
    """Parse the table. Raises LDMError for what is not as zoo.toml's head says."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise LDMError(f"{place} is not valid TOML ({error}): mend it there.") from error
    models = {name: read_model(name, entry, place) for name, entry in table.items()}
    for model in models.values():
        if unknown := [other for other in model.instead if other not in models]:
            raise LDMError(f"{place}: [{model.name}] names {unknown[0]!r}, which the table doesn't have.")
    return models


def read_model(name: str, entry: object, place: str) -> Model:
    where = f"{place}: [{name}]"
    if not isinstance(entry, dict) or not re.fullmatch(r"[a-z0-9][a-z0-9-]*", name):
        raise LDMError(f"{where} must be a table with a name of small letters, digits and hyphens.")
    known = [each.name for each in fields(Model) if each.name != "name"]
    if unknown := [key for key in entry if key not in known]:
        raise LDMError(f"{where} has an unknown field {unknown[0]!r}.{nearest(unknown[0], known)}")
    for key, value in entry.items():
        wanted = {"gated": bool, "sha256": dict}.get(key, list if key in LISTS else str)
        inner = value if isinstance(value, list) else value.values() if isinstance(value, dict) else ()
        if not isinstance(value, wanted) or not all(isinstance(each, str) for each in inner):
            raise LDMError(f"{where}: {key} must be a {wanted.__name__} (of texts, if it holds several).")
    if missing := [key for key in ("what", "repo", "licence") if key not in entry]:
        raise LDMError(f"{where} lacks {', '.join(missing)}.")
    if wrong := [text for text in entry.get("sha256", {}).values() if not re.fullmatch(r"[0-9a-f]{64}", text)]:
        raise LDMError(f"{where}: {wrong[0]!r} is no SHA-256, which has 64 hexadecimal digits.")
    model = Model(name, **{key: tuple(value) if key in LISTS else value for key, value in entry.items()})
    if any(source.url and source.path not in model.sha256 for source in model.sources):
        raise LDMError(f"{where}: what comes from a plain URL needs its sha256.")
    return model


LISTS = ("mirrors", "formerly", "instead", "files")
